//! The mesh's one secret. Invariant: it is never printed but by [`MeshKey::to_bytes`]'s callers, and everything
//! derived from it is the same on every node, for ever.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rand::TryRngCore;

use super::private_file::StateFileError;

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

    /// Reads a key as any program may have made it: 32 random bytes in either Base64, as `openssl rand -base64 32`.
    pub fn parse(text: &str) -> Option<Self> {
        let plain: String = text.trim().trim_end_matches('=').replace('+', "-").replace('/', "_");
        let bytes = URL_SAFE_NO_PAD.decode(plain).ok()?;
        bytes.try_into().ok().map(Self)
    }

    /// The seed of the CA's signing key.
    pub(super) fn ca_seed(&self) -> [u8; 32] {
        blake3::derive_key(CA_SEED, &self.0)
    }

    /// Names the key without telling it.
    pub fn id(&self) -> String {
        blake3::derive_key(MESH_ID, &self.0)[..6].iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl fmt::Debug for MeshKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MeshKey({})", self.id())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_derived_never_changes() {
        let key = MeshKey::from_bytes([7; KEY_LEN]);
        assert_eq!(key.id(), "280506027168");
        assert_ne!(key.id(), MeshKey::from_bytes([8; KEY_LEN]).id());
    }
}
