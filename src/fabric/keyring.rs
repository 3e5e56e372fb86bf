//! Which keys make a node a member now: one, or two while the mesh's key is being changed. Invariant: whatever the order
//! in which nodes learn of changes, all come to the same key; what the mesh is called never changes.

use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::keys::{KEY_LEN, KeyError, MeshKey};
use super::private_file;

/// The keys of a mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRing {
    current: MeshKey,
    previous: Option<MeshKey>,
    /// How often the key was changed.
    generation: u64,
    mesh_id: String,
    /// The public ids of keys that this node had before, the latest last.
    earlier: Vec<String>,
}

/// So many earlier keys are known again.
const MAX_EARLIER: usize = 100;

impl KeyRing {
    /// That of a new mesh.
    pub fn founded(key: MeshKey) -> Self {
        Self::joined(key.clone(), key.id())
    }

    /// That of a node which joins a mesh: what it is called is told by its nodes. How often its key was changed is
    /// heard later.
    pub fn joined(key: MeshKey, mesh_id: String) -> Self {
        Self { current: key, previous: None, generation: 0, mesh_id, earlier: Vec::new() }
    }

    /// The key of tokens, and of this node's certificate.
    pub fn current(&self) -> &MeshKey {
        &self.current
    }

    /// The key that is accepted besides it.
    pub fn previous(&self) -> Option<&MeshKey> {
        self.previous.as_ref()
    }

    /// How often the key was changed.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// What the mesh is called: two meshes never take each other for one.
    pub fn mesh_id(&self) -> &str {
        &self.mesh_id
    }

    /// Whether a node with this key is a member.
    pub fn accepts(&self, key: &MeshKey) -> bool {
        self.current == *key || self.previous.as_ref() == Some(key)
    }

    /// Whether it is, or was, a key of this mesh: a token of before says nothing new to a node that belongs.
    pub fn knows(&self, key: &MeshKey) -> bool {
        self.accepts(key) || self.mesh_id == key.id() || self.earlier.contains(&key.id())
    }

    /// With another key that a node of the mesh goes by.
    pub fn replaced_by(&self, key: &MeshKey) -> Self {
        let earlier = self.earlier_and_now();
        Self { earlier, ..Self::joined(key.clone(), self.mesh_id.clone()) }
    }

    fn earlier_and_now(&self) -> Vec<String> {
        let all = self.earlier.iter().cloned().chain([self.current.id()]);
        all.skip((self.earlier.len() + 1).saturating_sub(MAX_EARLIER)).collect()
    }

    /// With a new key; the one of now is accepted until it is [dropped](Self::without_previous).
    pub fn changed(&self) -> Result<Self, KeyError> {
        let previous = Some(self.current.clone());
        let (generation, earlier) = (self.generation + 1, self.earlier_and_now());
        Ok(Self {
            current: MeshKey::generate()?,
            previous,
            generation,
            earlier,
            mesh_id: self.mesh_id.clone(),
        })
    }

    /// With what another node has; `None` if that is not newer. Of two changes at once the greater id holds.
    pub fn with(&self, generation: u64, key: &MeshKey) -> Option<Self> {
        if *key == self.current {
            return (generation > self.generation).then(|| Self { generation, ..self.clone() });
        }
        if (generation, key.id()) <= (self.generation, self.current.id()) {
            return None;
        }
        let as_old = generation == self.generation;
        let previous = if as_old { self.previous.clone() } else { Some(self.current.clone()) };
        Some(Self { previous, generation, ..self.replaced_by(key) })
    }

    /// With the current key alone.
    pub fn without_previous(&self) -> Self {
        Self { previous: None, ..self.clone() }
    }

    /// Reads a key file; `None` when there is none.
    pub fn load(path: &Path) -> Result<Option<Self>, KeyError> {
        let Some(bytes) = private_file::read(path)? else { return Ok(None) };
        let damaged = || KeyError::Damaged { path: path.display().to_string() };
        let text = String::from_utf8(bytes).map_err(|_| damaged())?;
        Self::parse(&text).map(Some).ok_or_else(damaged)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let mut ring = Self::founded(parse_key(lines.next()?)?);
        for line in lines {
            match line.split_once(' ')? {
                ("mesh", id) if is_id(id) => ring.mesh_id = id.to_owned(),
                ("earlier", id) if is_id(id) => ring.earlier.push(id.to_owned()),
                ("generation", n) => ring.generation = n.parse().ok()?,
                ("previous", key) => ring.previous = Some(parse_key(key)?),
                _ => return None,
            }
        }
        Some(ring)
    }

    /// Writes a key file that only the owner can read.
    pub fn save(&self, path: &Path) -> Result<(), KeyError> {
        let key = |k: &MeshKey| URL_SAFE_NO_PAD.encode(k.to_bytes());
        let mut text = format!("{}\n", key(&self.current));
        if self.mesh_id != self.current.id() {
            text += &format!("mesh {}\n", self.mesh_id);
        }
        if self.generation > 0 {
            text += &format!("generation {}\n", self.generation);
        }
        if let Some(previous) = &self.previous {
            text += &format!("previous {}\n", key(previous));
        }
        for id in &self.earlier {
            text += &format!("earlier {id}\n");
        }
        Ok(private_file::write(path, text.as_bytes())?)
    }
}

fn is_id(text: &str) -> bool {
    text.len() == 12 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// A key as files have it.
pub(super) fn parse_key(text: &str) -> Option<MeshKey> {
    let bytes: [u8; KEY_LEN] = URL_SAFE_NO_PAD.decode(text.trim()).ok()?.try_into().ok()?;
    Some(MeshKey::from_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> MeshKey {
        MeshKey::from_bytes([n; KEY_LEN])
    }

    #[test]
    fn survives_its_file_and_hides_in_debug() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("mesh.key");
        assert!(KeyRing::load(&path).expect("readable").is_none());
        let first = KeyRing::founded(MeshKey::generate().expect("randomness"));
        let second = first.changed().expect("randomness");
        for ring in
            [&first, &second, &second.without_previous(), &KeyRing::joined(key(1), "00ff00ff00ff".into())]
        {
            ring.save(&path).expect("writable");
            assert_eq!(KeyRing::load(&path).expect("readable").as_ref(), Some(ring));
        }
        assert!(second.accepts(first.current()) && !second.without_previous().accepts(first.current()));
        assert_eq!(second.mesh_id(), first.mesh_id());
        let third = second.replaced_by(&key(3));
        assert!([&first, &second].iter().all(|r| third.knows(r.current()) && !third.accepts(r.current())));
        assert!(!third.knows(&key(4)));
        for ring in [&first, &second] {
            let secret = URL_SAFE_NO_PAD.encode(ring.current().to_bytes());
            assert!(!format!("{second:?}").contains(&secret));
        }
    }

    #[test]
    fn a_damaged_file_is_no_key_and_is_not_echoed() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("mesh.key");
        let good = URL_SAFE_NO_PAD.encode([1; KEY_LEN]);
        for text in
            ["", "c2hvcnQ", "not base64 ***", &format!("{good}\nprevious x"), &format!("{good}\nmesh ../a")]
        {
            std::fs::write(&path, text).expect("writable");
            let error = KeyRing::load(&path).expect_err("no key");
            assert!(matches!(error, KeyError::Damaged { .. }));
            assert!(text.is_empty() || !error.to_string().contains(text));
        }
    }

    #[test]
    fn all_come_to_one_key_whatever_they_hear_first() {
        let start = KeyRing::founded(key(0));
        let (a, b) = (start.with(1, &key(1)).expect("news"), start.with(1, &key(2)).expect("news"));
        let met = [a.with(1, &key(2)), b.with(1, &key(1))];
        let winner = met.iter().flatten().next().expect("one of them gives in").clone();
        assert_eq!(met.iter().flatten().count(), 1);
        assert_eq!(winner.previous(), Some(&key(0)), "what both accepted before");
        let third = winner.with(2, &key(3)).expect("news");
        assert_eq!(third.previous(), Some(winner.current()));
        assert!(third.with(1, &key(1)).is_none() && third.with(2, &key(3)).is_none());
        let joined = KeyRing::joined(key(3), start.mesh_id().to_owned());
        assert_eq!(joined.with(2, &key(3)).map(|r| r.generation()), Some(2));
    }
}
