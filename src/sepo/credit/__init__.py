"""Credit: the reward of every token, and the selection of key tokens."""
