//! Suggests the known name that was most likely meant by an unknown one.

/// Returns the known name that is nearest to this one, if it is near enough. Case is ignored.
pub(super) fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    const CHARS_MAX: usize = 100;
    let name: Vec<char> = name.to_lowercase().chars().take(CHARS_MAX).collect();
    // A third of the letters may be wrong.
    let distance_max = name.len().div_ceil(3).min(6);
    known
        .map(|known| {
            (
                distance(&name, &known.to_lowercase().chars().collect::<Vec<_>>()),
                known,
            )
        })
        .filter(|&(distance, _)| distance <= distance_max)
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, known)| known)
}

/// The number of letters to insert, remove, replace or swap with the next one to turn one name into
/// the other.
fn distance(a: &[char], b: &[char]) -> usize {
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut least = replaced.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                least = least.min(rows[i - 2][j - 2] + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

/// The bound of an unknown name: the suggestion if there is one, otherwise the known names.
pub(super) fn a_known_one(suggestion: &str, known: &[impl AsRef<str>]) -> String {
    if suggestion.is_empty() {
        let known: Vec<&str> = known.iter().map(AsRef::as_ref).collect();
        format!("a known one: {}", known.join(", "))
    } else {
        format!("a known one{suggestion}")
    }
}

/// The suggestion at the end of an error message, or nothing.
pub(super) fn did_you_mean<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> String {
    nearest(name, known).map_or_else(String::new, |nearest| format!("; did you mean {nearest}?"))
}

#[cfg(test)]
mod tests {
    use super::nearest;

    #[test]
    fn misspelt_name_has_a_suggestion_and_an_unrelated_name_has_none() {
        let known = ["ttl", "timeout", "max_hold", "max_keys", "shards"];
        for (name, expected) in [
            ("tll", Some("ttl")),
            ("TTL", Some("ttl")),
            ("tiemout", Some("timeout")),
            ("shard", Some("shards")),
            ("max-hold", Some("max_hold")),
            ("maxkeys", Some("max_keys")),
            ("image_tag", None),
            ("", None),
        ] {
            assert_eq!(nearest(name, known.into_iter()), expected, "{name}");
        }
    }
}
