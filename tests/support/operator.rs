//! The keys and tokens of a NATS system in operator mode, as its operator makes them with `nsc`.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use nkeys::KeyPair;
use serde_json::{Value, json};

/// An operator with a system account and one account for everything else.
pub struct Operator {
    operator: KeyPair,
    system: KeyPair,
    account: KeyPair,
}

impl Operator {
    pub fn new() -> Self {
        Self {
            operator: KeyPair::new_operator(),
            system: KeyPair::new_account(),
            account: KeyPair::new_account(),
        }
    }

    /// What a server's configuration says of it.
    pub fn conf(&self) -> String {
        let operator = sign(
            &self.operator,
            &self.operator.public_key(),
            "O",
            json!({ "type": "operator", "version": 2 }),
        );
        let account = |of: &KeyPair, name| {
            let stored = if name == "SYS" { 0 } else { -1 };
            let limits = json!({
                "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1,
                "leaf": -1, "mem_storage": stored, "disk_storage": stored, "streams": stored, "consumer": stored,
            });
            let claims =
                json!({ "limits": limits, "default_permissions": {}, "type": "account", "version": 2 });
            format!("{}: {:?}", of.public_key(), sign(&self.operator, &of.public_key(), name, claims))
        };
        format!(
            "operator: {operator:?}\nsystem_account: {}\nresolver: MEMORY\nresolver_preload {{ {}\n{} }}\n",
            self.system.public_key(),
            account(&self.system, "SYS"),
            account(&self.account, "A"),
        )
    }

    /// Writes the credentials of a new user of the account.
    pub fn user(&self, dir: &Path, name: &str) -> PathBuf {
        let user = KeyPair::new_user();
        let limits = json!({ "pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1, "type": "user", "version": 2 });
        let token = sign(&self.account, &user.public_key(), name, limits);
        let seed = user.seed().unwrap();
        let text = format!(
            "-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n\
             ************************* IMPORTANT *************************\nNKEY Seed printed below can be used to sign and \
             prove identity.\n\n-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        );
        let path = dir.join(format!("{name}.creds"));
        std::fs::write(&path, text).unwrap();
        path
    }
}

fn sign(issuer: &KeyPair, subject: &str, name: &str, claims: Value) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    // The id only has to be one.
    let claims = json!({
        "jti": format!("{name}{now}"), "iat": now, "iss": issuer.public_key(), "name": name, "sub": subject, "nats": claims,
    });
    let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let signed = format!("{}.{}", part(json!({ "typ": "JWT", "alg": "ed25519-nkey" })), part(claims));
    let signature = issuer.sign(signed.as_bytes()).unwrap();
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
}
