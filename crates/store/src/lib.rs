//! Placeholder while the contracts are laid down.
