"""A real Apache Kafka broker on this machine, for development, tests and benchmarks: one process, loopback only."""
