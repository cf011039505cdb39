"""Small, honestly trained models and the data they were trained on."""
