//! One process per directory.

use crate::error::LocalError;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;

/// The exclusive use of a directory, given back when it is dropped or the process ends, however it ends.
#[derive(Debug)]
pub struct DirLock {
    _file: File,
}

impl DirLock {
    /// Takes the directory, which is made where it does not exist.
    ///
    /// # Errors
    /// [`LocalError::InUse`] names the process that has it.
    pub fn acquire(dir: &Path) -> Result<Self, LocalError> {
        std::fs::create_dir_all(dir).map_err(LocalError::io("create", dir))?;
        let path = dir.join("lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(LocalError::io("open", &path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(LocalError::InUse { path: dir.to_owned(), owner: owner(&mut file) });
            }
            Err(TryLockError::Error(source)) => return Err(LocalError::io("lock", &path)(source)),
        }
        let written = file
            .set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| write!(file, "{}", std::process::id()));
        written.map_err(LocalError::io("write", &path))?;
        Ok(Self { _file: file })
    }
}

fn owner(file: &mut File) -> String {
    let mut pid = String::new();
    match file.read_to_string(&mut pid) {
        Ok(_) if !pid.trim().is_empty() => format!("process {}", pid.trim()),
        _ => "another process".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_user_is_told_who_has_the_directory() {
        let dir = std::env::temp_dir().join(format!("throughline-lock-{}", std::process::id()));
        let lock = DirLock::acquire(&dir).unwrap();
        let message = DirLock::acquire(&dir).unwrap_err().to_string();
        let expected = format!("{} is in use by process {};", dir.display(), std::process::id());
        assert!(message.starts_with(&expected), "{message}");
        drop(lock);
        DirLock::acquire(&dir).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
