"""How fast: the real training in turns with the notebooks' loop; what a step costs besides; where memory goes."""
