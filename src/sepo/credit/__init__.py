"""Credit: the reward of every token, and the key tokens among them."""
