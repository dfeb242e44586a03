"""The whole loop on embedded parts: what `mimstream demo` runs, and the stream that ships with the package."""
