//! tmp
/// tmp
pub fn render(s: &super::model::Status) -> String {
    format!("{s:#?}\n")
}
