//! Temporary directories for components.

use crate::error::LocalError;
use std::os::unix::fs::PermissionsExt;
use tempfile::TempDir;

/// Makes a directory that is removed when it is dropped. Unlike an ordinary temporary directory other users
/// may pass through it: PostgreSQL refuses to run as root, so root starts it as somebody else.
///
/// # Errors
/// When the system's temporary directory cannot be written.
pub fn scratch_dir() -> Result<TempDir, LocalError> {
    let place = std::env::temp_dir();
    let dir = tempfile::Builder::new()
        .prefix("throughline-")
        .permissions(std::fs::Permissions::from_mode(0o711))
        .tempdir();
    dir.map_err(LocalError::io("create a directory in", &place))
}
