//! A disk that is small enough to be filled.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What a run of minutes writes several times over, and little enough to be filled in a second.
const MEGABYTES: u32 = 1_024;

/// A file system of its own in a directory, in memory, unmounted when it is dropped.
#[derive(Debug)]
pub struct SmallDisk {
    mount: PathBuf,
}

impl SmallDisk {
    /// Mounts one at `directory`, which is made; `None` where this machine does not let us.
    ///
    /// # Panics
    /// When the directory cannot be made.
    pub fn mount(directory: &Path) -> Option<Self> {
        std::fs::create_dir_all(directory).expect("the scratch directory is writable");
        let size = format!("size={MEGABYTES}m,mode=0755");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &size, "throughline_chaos"]).arg(directory);
        let mounted = mount.stdout(Stdio::null()).stderr(Stdio::null()).status();
        mounted.is_ok_and(|status| status.success()).then(|| Self { mount: directory.to_owned() })
    }

    /// Takes all the space that is left.
    ///
    /// # Panics
    /// When the file that takes it cannot be made.
    pub fn fill(&self) {
        let mut file = std::fs::File::create(self.ballast()).expect("the disk is ours");
        let block = vec![0; 1 << 20];
        // The error is what this waits for; smaller and smaller pieces take the rest.
        for size in [1 << 20, 1 << 12] {
            while file.write(&block[..size]).is_ok_and(|written| written == size) {}
        }
    }

    /// Gives the space back.
    ///
    /// # Panics
    /// When the file is not there.
    pub fn free(&self) {
        std::fs::remove_file(self.ballast()).expect("it was filled before");
    }

    fn ballast(&self) -> PathBuf {
        self.mount.join("ballast")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: whoever still ends there keeps its files until then.
        let unmounted = Command::new("umount").arg("--lazy").arg(&self.mount).status();
        let done = unmounted.is_ok_and(|status| status.success());
        assert!(done || std::thread::panicking(), "cannot unmount {}", self.mount.display());
    }
}
