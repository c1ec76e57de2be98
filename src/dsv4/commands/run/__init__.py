"""`dsv4 run`: answers, chats, logits, comparisons."""
