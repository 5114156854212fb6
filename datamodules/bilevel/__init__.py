"""Problems of two levels."""
