"""Export feature maps to files, and read them back."""
