"""`mimstream record`: user histories kept ready for serving."""
