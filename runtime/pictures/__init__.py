"""Pictures: saving them, and the parameters they carry."""
