"""The values that all packages share, and small services: files, progress, ranks, object stores."""
