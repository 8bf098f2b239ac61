//! Where the parts of a running platform listen: `<data-dir>/endpoints.json`.

use crate::error::LocalError;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The file's name in the data directory.
pub const FILE: &str = "endpoints.json";

/// The addresses of a running platform. Fields that this version does not know are left out of account.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoints {
    /// Host and port of the MQTT listener, or the address of the external broker.
    pub mqtt: String,
    /// Kafka's bootstrap servers.
    pub kafka: String,
    /// Base address of the schema registry.
    pub registry: String,
    /// Base address of the HTTP server.
    pub http: String,
    /// Address of the metrics.
    pub metrics: String,
    /// `sqlite:///path` or `postgres://…`, without a password.
    pub database: String,
    /// The process that wrote this.
    pub pid: u32,
}

impl Endpoints {
    /// Writes the file in one step: readers see the old one or the new one.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub fn write(&self, data_dir: &Path) -> Result<(), LocalError> {
        let path = data_dir.join(FILE);
        let unfinished = data_dir.join(format!("{FILE}.{}.tmp", std::process::id()));
        let mut text = serde_json::to_string_pretty(self).expect("strings and numbers always serialise");
        text.push('\n');
        std::fs::write(&unfinished, text).map_err(LocalError::io("write", &unfinished))?;
        std::fs::rename(&unfinished, &path).map_err(LocalError::io("rename", &unfinished))
    }

    /// Reads the file; `None` where there is none, so where nothing was started with this directory or it
    /// was stopped in order.
    ///
    /// # Errors
    /// When the file cannot be read or understood.
    pub fn read(data_dir: &Path) -> Result<Option<Self>, LocalError> {
        let path = data_dir.join(FILE);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(LocalError::io("read", &path)(error)),
        };
        let parsed = serde_json::from_str(&text);
        parsed.map(Some).map_err(|error| LocalError::io("understand", &path)(error.into()))
    }

    /// Removes the file; it is no error where there is none.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub fn remove(data_dir: &Path) -> Result<(), LocalError> {
        let path = data_dir.join(FILE);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(LocalError::io("remove", &path)(error))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_removed() {
        let dir = std::env::temp_dir().join(format!("throughline-endpoints-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        assert_eq!(Endpoints::read(&dir).unwrap(), None);
        let endpoints = Endpoints {
            mqtt: "127.0.0.1:1883".to_owned(),
            kafka: "127.0.0.1:9092".to_owned(),
            registry: "http://127.0.0.1:8081".to_owned(),
            http: "http://127.0.0.1:8080".to_owned(),
            metrics: "http://127.0.0.1:8080/metrics".to_owned(),
            database: "sqlite:///x/warehouse.db".to_owned(),
            pid: 7,
        };
        endpoints.write(&dir).unwrap();
        assert_eq!(Endpoints::read(&dir).unwrap(), Some(endpoints));
        std::fs::write(dir.join(FILE), "{").unwrap();
        assert!(Endpoints::read(&dir).unwrap_err().to_string().starts_with("cannot understand "));
        Endpoints::remove(&dir).unwrap();
        Endpoints::remove(&dir).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
