//! tmp
pub mod http;
pub mod model;
pub mod table;
use std::sync::{Arc, Mutex};
/// tmp
#[derive(Clone, Default)]
pub struct StatusHandle(Arc<Mutex<model::Status>>);
#[allow(missing_docs)]
impl StatusHandle {
    pub fn new() -> Self {
        Self::default()
    }
    pub fn publish(&self, s: model::Status) {
        *self.0.lock().unwrap() = s;
    }
    pub fn current(&self) -> model::Status {
        self.0.lock().unwrap().clone()
    }
    pub fn beat(&self, _l: &str) {}
    pub fn retire(&self, _l: &str) {}
}
