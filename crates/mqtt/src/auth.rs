//! Who may connect, and as what.

use crate::config::{BridgeError, LoginConfig, read_secret};
use crate::transform::Scope;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha512;
use std::collections::HashMap;
use std::sync::Arc;
use throughline_model::ids::{DeviceKey, check_name};

/// More rounds than this would let a wrong configuration stop the listener: about 1 s.
const ITERATIONS_MAX: u32 = 1_000_000;

/// A user.
#[derive(Debug)]
pub struct Login {
    /// Its name.
    pub user: String,
    secret: Secret,
    sites: Option<Vec<String>>,
    devices: Option<Vec<String>>,
}

enum Secret {
    Plain(Vec<u8>),
    Pbkdf2 { iterations: u32, salt: Vec<u8>, hash: Vec<u8> },
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

impl Login {
    /// Checks a password. Takes up to a second where the hash has many rounds: call it off the workers.
    pub fn verify(&self, password: &[u8]) -> bool {
        match &self.secret {
            Secret::Plain(expected) => equal(expected, password),
            Secret::Pbkdf2 { iterations, salt, hash } => {
                equal(hash, &pbkdf2_sha512(password, salt, *iterations, hash.len()))
            }
        }
    }

    /// Returns what its clients may publish.
    pub fn scope(&self) -> Scope<'_> {
        Scope { sites: self.sites.as_deref(), devices: self.devices.as_deref() }
    }

    /// Returns its site where it has exactly one.
    pub fn single_site(&self) -> Option<&str> {
        match self.sites.as_deref() {
            Some([site]) => Some(site),
            _ => None,
        }
    }
}

/// All users.
#[derive(Debug, Default)]
pub struct Logins(HashMap<String, Arc<Login>>);

impl Logins {
    /// Reads the configured users and their secrets.
    ///
    /// # Errors
    /// Names the user and what is wrong.
    pub fn load(logins: &[LoginConfig]) -> Result<Self, BridgeError> {
        let mut all = HashMap::new();
        for config in logins {
            let key = format!("listener.logins `{}`", config.user);
            let refuse = |why: &str| BridgeError::Config { key: key.clone(), why: why.to_owned() };
            if config.user.is_empty() {
                return Err(refuse("has no `user`"));
            }
            let secret = match (&config.password_hash, &config.password_file) {
                (Some(hash), None) => parse_hash(hash).map_err(|why| refuse(&why))?,
                (None, Some(path)) => Secret::Plain(read_secret(&key, path)?.into_bytes()),
                _ => return Err(refuse("needs one of `password_hash` and `password_file`")),
            };
            if config.sites.is_empty() {
                return Err(refuse("needs `sites`, or `sites = [\"*\"]` for every site"));
            }
            let every_site = config.sites.iter().any(|s| s == "*");
            for site in config.sites.iter().filter(|_| !every_site) {
                check_name("site", site).map_err(|e| refuse(&e.to_string()))?;
            }
            for device in &config.devices {
                device.parse::<DeviceKey>().map_err(|e| refuse(&e.to_string()))?;
            }
            let login = Login {
                user: config.user.clone(),
                secret,
                sites: (!every_site).then(|| config.sites.clone()),
                devices: (!config.devices.is_empty()).then(|| config.devices.clone()),
            };
            if all.insert(config.user.clone(), Arc::new(login)).is_some() {
                return Err(refuse("is given twice"));
            }
        }
        Ok(Self(all))
    }

    /// Returns a user.
    pub fn find(&self, user: &str) -> Option<&Arc<Login>> {
        self.0.get(user)
    }
}

fn parse_hash(text: &str) -> Result<Secret, String> {
    let wrong =
        || "`password_hash` has the form `$7$<iterations>$<salt>$<hash>` (mosquitto_passwd)".to_owned();
    let parts: Vec<&str> = text.trim().split('$').collect();
    let ["", "7", iterations, salt, hash] = parts[..] else { return Err(wrong()) };
    let iterations: u32 = iterations.parse().map_err(|_| wrong())?;
    if !(1..=ITERATIONS_MAX).contains(&iterations) {
        return Err(format!("`password_hash` has {iterations} iterations, not 1 to {ITERATIONS_MAX}"));
    }
    let salt = BASE64_STANDARD.decode(salt).map_err(|_| wrong())?;
    let hash = BASE64_STANDARD.decode(hash).map_err(|_| wrong())?;
    if hash.is_empty() || hash.len() > 64 {
        return Err(wrong());
    }
    Ok(Secret::Pbkdf2 { iterations, salt, hash })
}

/// PBKDF2-HMAC-SHA-512 (RFC 8018, section 5.2), its first block, which is all that mosquitto_passwd keeps.
fn pbkdf2_sha512(password: &[u8], salt: &[u8], iterations: u32, len: usize) -> Vec<u8> {
    let keyed = Hmac::<Sha512>::new_from_slice(password).expect("HMAC takes keys of any length");
    let round = |parts: [&[u8]; 2]| {
        let mut mac = keyed.clone();
        mac.update(parts[0]);
        mac.update(parts[1]);
        mac.finalize().into_bytes()
    };
    let mut last = round([salt, &1u32.to_be_bytes()]);
    let mut sum = last;
    for _ in 1..iterations {
        last = round([&last, &[]]);
        sum.iter_mut().zip(&last).for_each(|(s, l)| *s ^= l);
    }
    sum[..len].to_vec()
}

/// Compares in a time that depends on the lengths only.
fn equal(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |different, (x, y)| different | (x ^ y)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pbkdf2_agrees_with_published_vectors() {
        // PBKDF2-HMAC-SHA-512, password "password", salt "salt": the vectors that OpenSSL and Python's
        // hashlib.pbkdf2_hmac give for 1 and 2 iterations.
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        assert_eq!(
            hex(&pbkdf2_sha512(b"password", b"salt", 1, 64)),
            "867f70cf1ade02cff3752599a3a53dc4af34c7a669815ae5d513554e1c8cf252c02d470a285a0501bad999bfe943c08f050235d7d68b1da55e63f73b60a57fce"
        );
        assert_eq!(
            hex(&pbkdf2_sha512(b"password", b"salt", 2, 64)),
            "e1d9c16aa681708a45f5c7c4e215ceb66e011a2e9f0040713f18aefdb866d53cf76cab2868a39b9f7840edce4fef5a82be67335c77a6068e04112754f27ccf4e"
        );
    }

    #[test]
    fn a_login_that_cannot_work_is_refused_with_its_user() {
        let base = LoginConfig {
            user: "u".to_owned(),
            password_hash: Some("$7$1$c2FsdA==$aGFzaA==".to_owned()),
            sites: vec!["site-1".to_owned()],
            ..LoginConfig::default()
        };
        let change = |f: fn(&mut LoginConfig)| {
            let mut login = base.clone();
            f(&mut login);
            Logins::load(&[login]).map(|_| ()).map_err(|e| e.to_string())
        };
        assert_eq!(change(|_| ()), Ok(()));
        for (change, why) in [
            (change(|l| l.password_hash = None), "needs one of"),
            (change(|l| l.password_hash = Some("$6$x".to_owned())), "mosquitto_passwd"),
            (change(|l| l.password_hash = Some("$7$0$YQ==$YQ==".to_owned())), "0 iterations"),
            (change(|l| l.sites.clear()), "needs `sites`"),
            (change(|l| l.sites = vec!["a/b".to_owned()]), "cannot name a site"),
            (change(|l| l.devices = vec!["pump".to_owned()]), "cannot name a device"),
        ] {
            let error = change.expect_err(why);
            assert!(error.contains(why) && error.contains("`u`"), "{error}");
        }
    }
}
