//! JSON text laid out for people without touching its tokens: order, numbers and escapes stay as they came.

use super::style::Style;

/// The text with line ends and two spaces per level. It must be valid JSON; anything else comes out unchanged in
/// substance, only with other spaces.
pub(crate) fn pretty(text: &str, style: Style) -> String {
    let mut out = String::with_capacity(text.len() * 2);
    let mut depth = 0usize;
    let mut chars = text.trim().chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' => {
                let string = string_token(&mut chars);
                skip_spaces(&mut chars);
                let is_key = chars.peek() == Some(&':');
                out.push_str(&if is_key { style.cyan(&string) } else { super::clean(&string) });
            }
            '{' | '[' => {
                out.push(c);
                skip_spaces(&mut chars);
                let close = if c == '{' { '}' } else { ']' };
                if chars.peek() == Some(&close) {
                    chars.next();
                    out.push(close);
                } else {
                    depth += 1;
                    new_line(&mut out, depth);
                }
            }
            '}' | ']' => {
                depth = depth.saturating_sub(1);
                new_line(&mut out, depth);
                out.push(c);
            }
            ',' => {
                out.push(c);
                new_line(&mut out, depth);
            }
            ':' => out.push_str(": "),
            c if c.is_whitespace() => {}
            c => out.push(c),
        }
    }
    out
}

type Chars<'a> = std::iter::Peekable<std::str::Chars<'a>>;

fn string_token(chars: &mut Chars<'_>) -> String {
    let mut out = String::from('"');
    while let Some(c) = chars.next() {
        out.push(c);
        match c {
            '\\' => out.extend(chars.next()),
            '"' => break,
            _ => {}
        }
    }
    out
}

fn skip_spaces(chars: &mut Chars<'_>) {
    while chars.next_if(|c| c.is_whitespace()).is_some() {}
}

fn new_line(out: &mut String, depth: usize) {
    out.push('\n');
    out.extend(std::iter::repeat_n("  ", depth));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_stay_as_they_came() {
        // Standard output of a test is no terminal, so nothing is coloured.
        let text = r#"{"b":[1.0,1e400,{}],"a" : "x, \" {y}" ,"e":[ ],"n":12345678901234567890}"#;
        let want = "{\n  \"b\": [\n    1.0,\n    1e400,\n    {}\n  ],\n  \"a\": \"x, \\\" {y}\",\n  \"e\": [],\n  \"n\": 12345678901234567890\n}";
        assert_eq!(pretty(text, Style::stdout()), want);
        assert_eq!(pretty(" null ", Style::stdout()), "null");
    }
}
