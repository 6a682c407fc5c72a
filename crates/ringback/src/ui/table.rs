//! Aligned columns, cut to the terminal's width.

use super::style::Style;

/// Widest cell outside of the last column.
const MAX_CELL: usize = 48;

/// Prints rows under their heads; `paint` colours a padded cell of a column.
pub(crate) fn print(
    heads: &[&str],
    rows: &[Vec<String>],
    paint: impl Fn(usize, &str) -> String,
) -> std::io::Result<()> {
    let style = Style::stdout();
    for (n, line) in render(heads, rows, super::columns(), paint).into_iter().enumerate() {
        super::out(&if n == 0 { style.dim(&line) } else { line })?;
    }
    Ok(())
}

fn render(
    heads: &[&str],
    rows: &[Vec<String>],
    columns: Option<usize>,
    paint: impl Fn(usize, &str) -> String,
) -> Vec<String> {
    let last = heads.len().saturating_sub(1);
    let mut widths: Vec<usize> = heads.iter().map(|head| head.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count().min(MAX_CELL));
        }
    }
    if let (Some(columns), Some(width)) = (columns, widths.last().copied()) {
        let before: usize = widths[..last].iter().map(|width| width + 2).sum();
        widths[last] = width.min(columns.saturating_sub(before).max(8));
    } else if let Some(width) = widths.last_mut() {
        // Nobody looks: nothing is cut.
        *width = usize::MAX;
    }
    let line = |cells: &[String], paint: &dyn Fn(usize, &str) -> String| {
        let mut out = String::new();
        for (n, cell) in cells.iter().enumerate() {
            let cut = cut(cell, if n == last { widths[n] } else { widths[n].max(1) });
            if n == last {
                out.push_str(&paint(n, &cut));
            } else {
                out.push_str(&paint(n, &format!("{cut:<width$}", width = widths[n])));
                out.push_str("  ");
            }
        }
        out.trim_end().to_owned()
    };
    let heads: Vec<String> = heads.iter().map(|head| (*head).to_owned()).collect();
    let mut lines = vec![line(&heads, &|_, text| text.to_owned())];
    lines.extend(rows.iter().map(|row| line(row, &paint)));
    lines
}

/// The text, cut with an ellipsis.
pub(crate) fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    let mut out: String = text.chars().take(width.saturating_sub(1)).collect();
    out.push('…');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_the_last_one_is_cut() {
        let rows = vec![
            vec!["a".to_owned(), "short".to_owned()],
            vec!["bbb".to_owned(), "something long".to_owned()],
        ];
        let plain = |_: usize, text: &str| text.to_owned();
        assert_eq!(
            render(&["ID", "ERROR"], &rows, Some(14), plain),
            ["ID   ERROR", "a    short", "bbb  somethin…"]
        );
        assert_eq!(render(&["ID", "ERROR"], &rows, None, plain)[2], "bbb  something long");
    }
}
