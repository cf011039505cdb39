"""Opens artifacts and runs them."""
