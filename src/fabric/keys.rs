//! The mesh's one secret. Invariant: it is never printed but by [`MeshKey::to_bytes`]'s callers, and everything
//! derived from it is the same on every node, for ever.

use std::fmt;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rand::TryRngCore;

use super::private_file::{self, StateFileError};

/// Bytes in a key.
pub const KEY_LEN: usize = 32;

const CA_SEED: &str = "litemesh 2025 mesh CA Ed25519 seed v1";
const MESH_ID: &str = "litemesh 2025 public mesh id v1";

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file system refused.
    #[error(transparent)]
    File(#[from] StateFileError),
    /// The file is not a key.
    #[error("{path} is not a mesh key: restore it from a backup, or from another node's token")]
    Damaged {
        /// The file.
        path: String,
    },
    /// The system has no randomness to give.
    #[error("the system gives no random bytes for a new mesh key: {0}")]
    NoRandomness(String),
}

/// The secret that makes a node a member.
#[derive(Clone, PartialEq, Eq)]
pub struct MeshKey([u8; KEY_LEN]);

impl MeshKey {
    /// A new key, for a new mesh.
    pub fn generate() -> Result<Self, KeyError> {
        let mut bytes = [0; KEY_LEN];
        rand::rngs::OsRng.try_fill_bytes(&mut bytes).map_err(|e| KeyError::NoRandomness(e.to_string()))?;
        Ok(Self(bytes))
    }

    /// A key received from elsewhere.
    pub fn from_bytes(bytes: [u8; KEY_LEN]) -> Self {
        Self(bytes)
    }

    /// The secret itself: for a token or the key file, nothing else.
    pub fn to_bytes(&self) -> [u8; KEY_LEN] {
        self.0
    }

    /// Reads a key file; `None` when there is none.
    pub fn load(path: &Path) -> Result<Option<Self>, KeyError> {
        let Some(text) = private_file::read(path)? else { return Ok(None) };
        let damaged = || KeyError::Damaged { path: path.display().to_string() };
        let bytes = URL_SAFE_NO_PAD.decode(text.trim_ascii_end()).map_err(|_| damaged())?;
        Ok(Some(Self(bytes.try_into().map_err(|_| damaged())?)))
    }

    /// Writes a key file that only the owner can read.
    pub fn save(&self, path: &Path) -> Result<(), KeyError> {
        let text = format!("{}\n", URL_SAFE_NO_PAD.encode(self.0));
        Ok(private_file::write(path, text.as_bytes())?)
    }

    /// The seed of the CA's signing key.
    pub(super) fn ca_seed(&self) -> [u8; 32] {
        blake3::derive_key(CA_SEED, &self.0)
    }

    /// Names the mesh without telling its key: two meshes never take each other for one.
    pub fn mesh_id(&self) -> String {
        blake3::derive_key(MESH_ID, &self.0)[..6].iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl fmt::Debug for MeshKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MeshKey(of mesh {})", self.mesh_id())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_its_file_and_hides_in_debug() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("mesh.key");
        assert!(MeshKey::load(&path).expect("readable").is_none());
        let key = MeshKey::generate().expect("randomness");
        key.save(&path).expect("writable");
        assert_eq!(MeshKey::load(&path).expect("readable"), Some(key.clone()));
        let shown = format!("{key:?}");
        let secret = URL_SAFE_NO_PAD.encode(key.to_bytes());
        assert!(!shown.contains(&secret) && shown.contains(&key.mesh_id()));
    }

    #[test]
    fn a_damaged_file_is_no_key_and_is_not_echoed() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("mesh.key");
        for text in ["", "c2hvcnQ", "not base64 ***"] {
            std::fs::write(&path, text).expect("writable");
            let error = MeshKey::load(&path).expect_err("no key");
            assert!(matches!(error, KeyError::Damaged { .. }));
            assert!(text.is_empty() || !error.to_string().contains(text));
        }
    }

    #[test]
    fn what_is_derived_never_changes() {
        let key = MeshKey::from_bytes([7; KEY_LEN]);
        assert_eq!(key.mesh_id(), "280506027168");
        assert_ne!(key.mesh_id(), MeshKey::from_bytes([8; KEY_LEN]).mesh_id());
    }
}
