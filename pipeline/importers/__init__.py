"""Teacher outputs that other projects kept, converted into a cache."""
