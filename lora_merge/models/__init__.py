"""What is known of model classes, from config.json and names alone."""
