//! The mesh's key is changed while everything goes on, and with members away.

use litemesh::fabric::keyring::KeyRing;
use litemesh::fabric::preflight::PreflightError;
use litemesh::fabric::{FabricError, JoinToken};

use crate::support::{Node, Site, eventually, until_heard};

fn token(node: &Node) -> JoinToken {
    node.fabric.join_token().expect("a token")
}

fn ring(site: &Site) -> KeyRing {
    KeyRing::load(&site.state().key()).expect("readable").expect("there")
}

async fn refused(join: JoinToken) -> FabricError {
    let site = Site::new("stranger");
    site.try_start(Some(join)).await.err().expect("refused")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_key_reaches_everybody_and_then_the_old_one_opens_nothing() {
    let sites = ["a", "b", "c", "d", "e"].map(Site::new);
    let [a_site, b_site, c_site, d_site, e_site] = &sites;
    let mut a = a_site.start(None).await;
    let old = token(&a);
    let mut b = b_site.start(Some(old.clone())).await;
    let c = c_site.start(Some(old.clone())).await;
    for peer in ["b", "c"] {
        a.connected_to(peer).await;
    }
    b.connected_to("c").await;
    eventually("all know each other", async || {
        a.fabric.members().len() == 2 && b.fabric.members().len() == 2
    })
    .await;
    let mesh = a.fabric.mesh_id();
    c.fabric.shutdown().await;

    a.fabric.change_key().expect("changed");
    eventually("b has the new key", async || token(&b).key() == token(&a).key()).await;
    let new = token(&a);
    assert_ne!(new.key(), old.key());
    eventually("c is waited for", async || a.fabric.without_new_key() == [c_site.name.clone()]).await;
    let again = a.fabric.change_key().expect_err("one at a time").to_string();
    assert!(again.contains("(c)") && again.contains("--drop-old"), "{again}");
    // Whoever is connected stays so, and both tokens are good.
    until_heard(&a, &mut b, "a goes on").await;
    let d = d_site.start(Some(new.clone())).await;
    d.connected_to("a").await;
    let e = e_site.start(Some(old.clone())).await;
    e.connected_to("a").await;
    eventually("e is given the new key", async || token(&e).key() == new.key()).await;
    // A server that comes back finds the others with the certificates of now.
    b.kill_9().await;
    let b = b_site.start(None).await;
    b.connected_to("a").await;
    b.connected_to("d").await;
    until_heard(&b, &mut a, "b is back").await;
    // Those who know c wait for it.
    for (node, site) in [(&a, a_site), (&b, b_site)] {
        assert_eq!((node.fabric.mesh_id(), node.fabric.is_key_changing()), (mesh.clone(), true));
        assert!(ring(site).accepts(old.key()));
    }

    // With nothing but the old key.
    let c = c_site.start(None).await;
    c.connected_to("b").await;
    let all = [&a, &b, &c, &d, &e];
    for node in all {
        eventually("the change ends", async || !node.fabric.is_key_changing()).await;
        assert_eq!((token(node).key(), node.fabric.mesh_id()), (new.key(), mesh.clone()));
    }
    assert!(sites.iter().all(|s| !ring(s).accepts(old.key())));
    let error = refused(old).await;
    assert!(matches!(&error, FabricError::Join(PreflightError::OtherMesh { .. })), "{error}");
    // It goes on from there, and those who never had the first key take part.
    d.fabric.change_key().expect("changed");
    for node in all {
        eventually("everybody has the third key", async || {
            token(node).key() == token(&d).key() && !node.fabric.is_key_changing()
        })
        .await;
    }
    assert_ne!(token(&d).key(), new.key());
    for node in [a, b, c, d, e] {
        node.fabric.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_missed_the_change_is_locked_out_until_it_is_told_the_new_key() {
    let (a_site, b_site) = (Site::new("a"), Site::new("b"));
    let a = a_site.start(None).await;
    let old = token(&a);
    let b = b_site.start(Some(old.clone())).await;
    a.connected_to("b").await;
    eventually("a knows b", async || !a.fabric.members().is_empty()).await;
    b.fabric.shutdown().await;
    a.fabric.change_key().expect("changed");
    a.fabric.drop_old_key().expect("dropped");
    let new = token(&a);
    assert!(!a.fabric.is_key_changing() && a.fabric.without_new_key().is_empty());

    let b = b_site.start(None).await;
    let error = refused(old).await;
    assert!(matches!(&error, FabricError::Join(PreflightError::OtherMesh { .. })), "{error}");
    assert!(error.to_string().contains("key was changed"), "{error}");
    assert!(a.fabric.server_info().await.routes.is_empty() && b.fabric.server_info().await.routes.is_empty());
    b.fabric.shutdown().await;
    // The token of now, and no other mesh's.
    let elsewhere = Site::new("x");
    let x = elsewhere.start(None).await;
    let error = b_site.try_start(Some(token(&x))).await.err().expect("refused");
    assert!(matches!(error, FabricError::BelongsElsewhere), "{error}");
    x.fabric.shutdown().await;
    let mut b = b_site.start(Some(new.clone())).await;
    b.connected_to("a").await;
    until_heard(&a, &mut b, "welcome back").await;
    assert_eq!((token(&b).key(), b.fabric.mesh_id()), (new.key(), a.fabric.mesh_id()));
    // From now on without a token.
    b.fabric.shutdown().await;
    let b = b_site.start(None).await;
    b.connected_to("a").await;
    for node in [a, b] {
        node.fabric.shutdown().await;
    }
}
