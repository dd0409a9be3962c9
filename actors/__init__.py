"""Ray and nothing but Ray: the tower processes, where they are placed, and the cell that starts and watches them."""
