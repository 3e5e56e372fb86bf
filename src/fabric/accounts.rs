//! The accounts of this node's server and their passwords. Invariant: a password exists in one file that only the
//! owner can read, in the server's configuration (the same), and in memory.

use std::fmt;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rand::TryRngCore;
use serde::{Deserialize, Serialize};

use super::private_file::{self, StateFileError};

/// Why there are no passwords.
#[derive(Debug, thiserror::Error)]
pub enum AccountsError {
    /// The file system refused.
    #[error(transparent)]
    File(#[from] StateFileError),
    /// The file is not what we wrote.
    #[error("{path} is damaged: delete it, new passwords are made at the next start")]
    Damaged {
        /// The file.
        path: String,
    },
    /// The system has no randomness to give.
    #[error("the system gives no random bytes for new passwords: {0}")]
    NoRandomness(String),
}

/// A password, which no log ever shows.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Password(String);

impl Password {
    fn generate() -> Result<Self, AccountsError> {
        let mut bytes = [0; 24];
        rand::rngs::OsRng
            .try_fill_bytes(&mut bytes)
            .map_err(|e| AccountsError::NoRandomness(e.to_string()))?;
        Ok(Self(URL_SAFE_NO_PAD.encode(bytes)))
    }

    /// The password itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(..)")
    }
}

/// The system account's user.
pub const SYS_USER: &str = "sys";
/// Our own account's user.
pub const MESH_USER: &str = "mesh";
/// The user of the host's own programs.
pub const APP_USER: &str = "app";
/// The user of the connection that tells the server it is not alone.
pub const GATE_USER: &str = "gate";

/// A password an account. They are this node's own: another node's server has others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accounts {
    /// Of [`SYS_USER`].
    pub sys: Password,
    /// Of [`MESH_USER`].
    pub mesh: Password,
    /// Of [`APP_USER`].
    pub app: Password,
    /// Of [`GATE_USER`].
    pub gate: Password,
}

impl Accounts {
    /// New passwords.
    pub fn generate() -> Result<Self, AccountsError> {
        Ok(Self {
            sys: Password::generate()?,
            mesh: Password::generate()?,
            app: Password::generate()?,
            gate: Password::generate()?,
        })
    }

    /// Those of the file, made at the first start.
    pub fn load_or_create(path: &Path) -> Result<Self, AccountsError> {
        if let Some(bytes) = private_file::read(path)? {
            return serde_json::from_slice(&bytes)
                .map_err(|_| AccountsError::Damaged { path: path.display().to_string() });
        }
        let accounts = Self::generate()?;
        let text = serde_json::to_vec_pretty(&accounts).expect("strings become JSON");
        private_file::write(path, &text)?;
        Ok(accounts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stay_the_same_and_hidden() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("accounts.json");
        let first = Accounts::load_or_create(&path).expect("writable");
        assert_eq!(Accounts::load_or_create(&path).expect("readable"), first);
        assert_ne!(first.sys, first.app);
        assert!(!format!("{first:?}").contains(first.sys.reveal()));
        std::fs::write(&path, "{").expect("writable");
        assert!(matches!(Accounts::load_or_create(&path), Err(AccountsError::Damaged { .. })));
    }
}
