"""The commands `sepo generate`, `sepo judge` and `sepo winrate`."""
