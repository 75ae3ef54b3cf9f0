"""Stand-ins for what the machine that runs the tests may not have: a GPU, its driver, its libraries."""
