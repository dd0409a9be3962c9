"""Only Ray: the tower processes, their placement, and the cell that starts and watches them."""
