"""Parts of the embedded log: its file, the thread that writes it, its consumer groups, its retention."""
