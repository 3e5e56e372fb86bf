//! The join token, `lm1-<key and checksum>@host:port[,host:port]`. Invariant: no error and no `Debug` echoes the part
//! before the `@`.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::address::{Address, AddressError};
use super::keys::{KEY_LEN, MeshKey};

const PREFIX: &str = "lm1-";
const CHECKSUM_LEN: usize = 4;
const CHECKSUM: &str = "litemesh 2025 join token checksum v1";

/// Why a text is no token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It does not begin as a token does.
    #[error("this is no join token: it must begin with {PREFIX:?}")]
    WrongPrefix,
    /// Nothing says whom to join.
    #[error("the join token has no address: it must end with @host:port")]
    NoAddress,
    /// The secret part has the wrong length.
    #[error("the join token is cut short or too long: copy the whole of it")]
    WrongLength,
    /// The secret part has a character it cannot have.
    #[error("the join token has a character that does not belong: copy it again")]
    BadCharacter,
    /// The secret part is not as it was made.
    #[error("the join token was changed on its way (its checksum is wrong): copy it again")]
    BadChecksum,
    /// One of its addresses cannot be dialled.
    #[error("the join token: {0}")]
    BadAddress(#[from] AddressError),
}

/// What a new node needs to become a member.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    key: MeshKey,
    addresses: Vec<Address>,
}

impl JoinToken {
    /// A token for the mesh of `key`, whose nodes listen at `addresses`.
    pub fn new(key: MeshKey, addresses: Vec<Address>) -> Result<Self, TokenError> {
        if addresses.is_empty() { Err(TokenError::NoAddress) } else { Ok(Self { key, addresses }) }
    }

    /// The mesh's secret.
    pub fn key(&self) -> &MeshKey {
        &self.key
    }

    /// Where its nodes listen: never empty.
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// The token as it is handed on. Whoever reads it can join.
    pub fn reveal(&self) -> String {
        let mut bytes = self.key.to_bytes().to_vec();
        bytes.extend(checksum(&self.key.to_bytes()));
        let addresses: Vec<_> = self.addresses.iter().map(Address::to_string).collect();
        format!("{PREFIX}{}@{}", URL_SAFE_NO_PAD.encode(bytes), addresses.join(","))
    }
}

fn checksum(key: &[u8; KEY_LEN]) -> [u8; CHECKSUM_LEN] {
    let whole = blake3::derive_key(CHECKSUM, key);
    std::array::from_fn(|i| whole[i])
}

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let rest = text.trim().strip_prefix(PREFIX).ok_or(TokenError::WrongPrefix)?;
        let (secret, addresses) = rest.split_once('@').ok_or(TokenError::NoAddress)?;
        if secret.chars().any(|c| !(c.is_ascii_alphanumeric() || c == '-' || c == '_')) {
            return Err(TokenError::BadCharacter);
        }
        let bytes = URL_SAFE_NO_PAD.decode(secret).map_err(|_| TokenError::WrongLength)?;
        let (key, sum) = bytes.split_at_checked(KEY_LEN).ok_or(TokenError::WrongLength)?;
        if sum.len() != CHECKSUM_LEN {
            return Err(TokenError::WrongLength);
        }
        let key: [u8; KEY_LEN] = key.try_into().map_err(|_| TokenError::WrongLength)?;
        if sum != checksum(&key) {
            return Err(TokenError::BadChecksum);
        }
        let addresses = addresses
            .split(',')
            .filter(|part| !part.is_empty())
            .map(str::parse)
            .collect::<Result<Vec<Address>, _>>()?;
        Self::new(MeshKey::from_bytes(key), addresses)
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken").field("key", &self.key).field("addresses", &self.addresses).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        let addresses = ["10.0.0.1:6222", "[fe80::2]:6223", "c.example:1"];
        let addresses = addresses.iter().map(|text| text.parse().expect("an address")).collect();
        JoinToken::new(MeshKey::from_bytes([9; KEY_LEN]), addresses).expect("has addresses")
    }

    #[test]
    fn comes_back_as_it_was() {
        let text = token().reveal();
        assert!(text.starts_with("lm1-") && text.ends_with("@10.0.0.1:6222,[fe80::2]:6223,c.example:1"));
        assert_eq!(text.parse(), Ok(token()));
        assert_eq!(format!(" {text}\n").parse(), Ok(token()), "a pasted line has blanks around it");
    }

    #[test]
    fn every_fault_has_its_error_and_none_echoes_the_secret() {
        let text = token().reveal();
        let (secret, _) = text.split_once('@').expect("has one");
        let body = &secret[PREFIX.len()..];
        let flipped = if body.starts_with('A') { "B" } else { "A" };
        let cases = [
            (text.replacen("lm1-", "lm9-", 1), TokenError::WrongPrefix),
            (secret.to_owned(), TokenError::NoAddress),
            (format!("{secret}@"), TokenError::NoAddress),
            (format!("{}@h:1", &secret[..secret.len() - 4]), TokenError::WrongLength),
            (format!("{}@h:1", &secret[..secret.len() - 3]), TokenError::WrongLength),
            (format!("{}@h:1", &secret[..8]), TokenError::WrongLength),
            (format!("{secret}AAAA@h:1"), TokenError::WrongLength),
            (format!("{PREFIX}{flipped}{}@h:1", &body[1..]), TokenError::BadChecksum),
            (format!("{PREFIX}*{}@h:1", &body[1..]), TokenError::BadCharacter),
        ];
        for (text, wanted) in cases {
            let error = text.parse::<JoinToken>().expect_err("no token");
            assert_eq!(error, wanted);
            assert!(!error.to_string().contains(&body[..12]));
        }
        let bad = format!("{secret}@host").parse::<JoinToken>().expect_err("no port");
        assert!(matches!(bad, TokenError::BadAddress(_)) && !bad.to_string().contains(body));
        assert!(!format!("{:?}", token()).contains(body));
    }
}
