"""The platform's commands, by name: (one line of help, module). Light: imported for every ``everloop`` call."""

COMMANDS = {
    "up": ("run the platform here until Ctrl-C", "services.commands.up"),
    "status": (
        "what is live, why the last candidate was or was not promoted, what comes next",
        "services.commands.status",
    ),
    "doctor": ("what is missing here, and the command that fixes it", "services.commands.doctor"),
    "demo": ("close the loop on real messages and show the improvement", "services.commands.demo"),
    "pause": ("start no new runs and no new canaries; serving goes on", "services.commands.pause"),
    "resume": ("undo a pause", "services.commands.resume"),
    "release": ("list and watch releases; promote, roll back, veto, freeze or register", "services.commands.release"),
    "dead-letters": ("list what handlers could not take; replay it once mended", "services.commands.dead_letters"),
    "retrain": ("start a training run now, or repeat an earlier one", "services.commands.retrain"),
    "replay": ("handle the log again from a time on, or score history again", "services.commands.replay"),
    "sql": ("ask DuckDB about episodes, turns, scores, feedback, releases", "services.commands.sql"),
    "export": ("write a pinned data set", "services.commands.export"),
    "gold": ("add, import or list held-out questions with right answers", "services.commands.gold"),
    "compare": ("two adapters on the gold set, side by side", "services.commands.compare"),
    "evaluate": (
        "what an adapter would be worth, from logged answers, before users see it",
        "services.commands.evaluate",
    ),
    "reward": ("how good the reward model is; its versions: compare, roll back, promote", "services.commands.reward"),
    "explain": ("why an episode's answers got their scores, and what would change it", "services.commands.explain"),
    "keys": ("create, list or revoke API keys", "services.commands.keys"),
    "base": ("build a small base model from your own examples", "services.commands.base"),
    "kafka": ("a real Kafka broker on this machine: start, stop, status", "services.commands.kafka"),
    "topics": ("make and check the topics and grants of the log on Kafka, as declared", "services.commands.topics"),
    "worker": ("one more worker of a handler, beside those that run (Kafka)", "services.commands.worker"),
    "mlflow": ("open MLflow on this installation's runs", "services.commands.mlflow"),
}
