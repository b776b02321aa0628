"""`sepo analyse`: what token rewards look like, and how far to trust them."""
