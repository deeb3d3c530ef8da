//! What a Prometheus expression reads: its metrics, how it selects among their series, and the
//! labels it groups by.
//!
//! This only finds names in a valid expression. promtool checks whether an expression is valid.

/// A lexical token of an expression.
#[derive(Debug, PartialEq)]
enum Token {
    Word(String),
    Text(String),
    /// A number or a duration.
    Number,
    Mark(String),
}

/// A metric with its label matchers.
#[derive(Debug, PartialEq)]
pub(crate) struct Selector {
    pub(crate) metric: String,
    pub(crate) matchers: Vec<Matcher>,
}

#[derive(Debug, PartialEq)]
pub(crate) struct Matcher {
    pub(crate) label: String,
    pub(crate) operator: String,
    pub(crate) value: String,
}

/// The names found in an expression.
#[derive(Debug, Default)]
pub(crate) struct Names {
    pub(crate) selectors: Vec<Selector>,
    /// Labels in `by (...)`, `ignoring (...)` and the like.
    pub(crate) groupings: Vec<String>,
}

const GROUPINGS: [&str; 6] = ["by", "without", "on", "ignoring", "group_left", "group_right"];
/// Operators and modifiers that are words.
const WORDS: [&str; 5] = ["and", "or", "unless", "bool", "offset"];

fn tokens(expr: &str) -> Vec<Token> {
    let chars: Vec<char> = expr.chars().collect();
    let mut tokens = Vec::new();
    let mut at = 0;
    while at < chars.len() {
        let start = at;
        let run = |from: usize, is_part: fn(char) -> bool| {
            from + chars[from..].iter().take_while(|&&char| is_part(char)).count()
        };
        match chars[at] {
            char if char.is_whitespace() => at += 1,
            quote @ ('"' | '\'') => {
                at += 1 + chars[at + 1..].iter().take_while(|&&char| char != quote).count();
                let text: String = chars[start + 1..at].iter().collect();
                assert!(!text.contains('\\'), "escapes are not supported here: {expr}");
                tokens.push(Token::Text(text));
                at += 1;
            }
            char if char.is_ascii_digit() => {
                at = run(at, |char| char.is_ascii_alphanumeric() || char == '.');
                tokens.push(Token::Number);
            }
            char if char.is_ascii_alphabetic() || char == '_' || char == ':' => {
                at = run(at, |char| char.is_ascii_alphanumeric() || char == '_' || char == ':');
                tokens.push(Token::Word(chars[start..at].iter().collect()));
            }
            '=' | '!' | '~' | '<' | '>' => {
                at = run(at, |char| matches!(char, '=' | '!' | '~' | '<' | '>'));
                tokens.push(Token::Mark(chars[start..at].iter().collect()));
            }
            mark => {
                at += 1;
                tokens.push(Token::Mark(mark.to_string()));
            }
        }
    }
    tokens
}

/// Whether this token follows the name of a function or an aggregation, and thus not a metric.
fn follows_function(token: &Token) -> bool {
    match token {
        Token::Mark(mark) => mark == "(",
        Token::Word(word) => word == "by" || word == "without",
        _ => false,
    }
}

/// Finds the names in an expression, or in a series of a unit test.
pub(crate) fn names(expr: &str) -> Names {
    let mut names = Names::default();
    let mut tokens = tokens(expr).into_iter().peekable();
    let is = |token: Option<&Token>, mark: &str| matches!(token, Some(Token::Mark(found)) if found == mark);
    while let Some(token) = tokens.next() {
        let Token::Word(word) = token else { continue };
        if GROUPINGS.contains(&word.as_str()) {
            assert!(is(tokens.next().as_ref(), "("), "{word} without its labels: {expr}");
            for token in tokens.by_ref() {
                match token {
                    Token::Word(label) => names.groupings.push(label),
                    token if is(Some(&token), ")") => break,
                    _ => {}
                }
            }
        } else if WORDS.contains(&word.as_str()) || tokens.peek().is_some_and(follows_function) {
            // promtool checks the names of functions.
        } else {
            let mut matchers = Vec::new();
            if tokens.next_if(|token| is(Some(token), "{")).is_some() {
                while let Some(token) = tokens.next_if(|token| !is(Some(token), "}")) {
                    let Token::Word(label) = token else { continue };
                    let (Some(Token::Mark(operator)), Some(Token::Text(value))) = (tokens.next(), tokens.next()) else {
                        panic!("{label} is not compared with a string: {expr}");
                    };
                    matchers.push(Matcher { label, operator, value });
                }
            }
            names.selectors.push(Selector { metric: word, matchers });
        }
    }
    names
}

#[test]
fn names_are_found_in_expressions() {
    let found = names(
        r#"histogram_quantile(0.99, sum by (job, le) (rate(a_seconds_bucket{b!~"c|d", e="f"}[5m]))) >= 1e3
           and on (job) job:g:sum > bool 2 * (h offset 10m)"#,
    );
    assert_eq!(found.groupings, ["job", "le", "job"]);
    let metrics: Vec<_> = found
        .selectors
        .iter()
        .map(|selector| selector.metric.as_str())
        .collect();
    assert_eq!(metrics, ["a_seconds_bucket", "job:g:sum", "h"]);
    let matchers: Vec<_> = found.selectors[0]
        .matchers
        .iter()
        .map(|matcher| {
            (
                matcher.label.as_str(),
                matcher.operator.as_str(),
                matcher.value.as_str(),
            )
        })
        .collect();
    assert_eq!(matchers, [("b", "!~", "c|d"), ("e", "=", "f")]);
}
