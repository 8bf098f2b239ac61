//! End-to-end scenarios and the tidy test.
