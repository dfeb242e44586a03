"""`mimstream evaluate`: models side by side on a data-set folder, judged by what came later."""
