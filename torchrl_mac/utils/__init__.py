"""General tools for files and processes; they know nothing of the rest of the package."""
