"""Real demonstration pictures: the installed colour-emoji font, and scenes composed of it."""
