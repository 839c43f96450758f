"""Speed side by side: variants of one job in alternated rounds, as ratios."""
