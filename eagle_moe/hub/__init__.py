"""The way to the Hub: a folder is made, checked, described and uploaded, and pulled again."""
