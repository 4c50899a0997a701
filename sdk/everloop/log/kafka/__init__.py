"""The log on Apache Kafka. ``kafka`` (kafka-python) is imported below this folder and nowhere else.

::

    KafkaLog (log.py) ─┬─ append ──▶ Appender (appender.py): one thread, one idempotent producer, rebuilt when wedged
                       ├─ read ────▶ Readers (reader.py): consumers without a group, one for each thread that reads
                       ├─ consumer ▶ Member (member.py): a member of a group
                       ├─ fenced ──▶ FencedWriter (fenced.py): one transaction a write, for workers
                       └─ topics, offsets, groups ▶ Cluster (cluster.py): one admin client

``settings.py`` says where and as whom; ``clients.py`` makes kafka-python's clients and turns its errors into ours;
``diagnosis.py`` finds out why nothing answers; ``records.py`` is the form of a record on the wire; ``plan.py``
compares what is declared with what is there.
"""
