"""Pictures: reading and saving them, the sizes and patches that models take in, and the parameters they carry."""
