"""Reports made from one results file: the terminal's table and the README's."""
