//! What both plots share: colours that colour-blind readers tell apart (Okabe and Ito, "Color Universal Design"), text
//! sizes, a white ground, and the error of a drawing.
//!
//! The SVG back-end measures no fonts: text is placed by its size alone and drawn by the viewer, so no fonts are needed
//! here.

use dsv3_core::Error;
use plotters::{
    coord::Shift,
    prelude::*,
    style::text_anchor::{HPos, Pos, VPos},
};

/// Blue, vermilion, green, orange, purple, sky blue, black.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(230, 159, 0),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
];
/// Axes and text.
pub(super) const INK: RGBColor = RGBColor(40, 40, 40);
/// Grid lines.
pub(super) const GRID: RGBColor = RGBColor(225, 225, 225);
/// Units of a drawing in one pixel of the shown picture: the back-end rounds to whole units.
pub(super) const UNITS: i32 = 4;
/// Text of ticks and values.
pub(super) const SMALL: i32 = 12 * UNITS;
/// Text of axes and legends.
pub(super) const MEDIUM: i32 = 13 * UNITS;
/// Titles of panels.
pub(super) const LARGE: i32 = 15 * UNITS;

/// The colour of the run or bar with this index.
pub(super) fn colour(index: usize) -> RGBColor {
    COLOURS[index % COLOURS.len()]
}

/// Text of a size, anchored at the side and on the middle of its height.
pub(super) fn text(size: i32, side: HPos) -> TextStyle<'static> {
    let style = TextStyle::from(("sans-serif", size).into_font()).color(&INK);
    style.pos(Pos::new(side, VPos::Center))
}

/// A drawing of this size in units, as an SVG that is shown [`UNITS`] times smaller, on white.
pub(super) fn svg(
    (width, height): (i32, i32),
    draw: impl FnOnce(&DrawingArea<SVGBackend<'_>, Shift>) -> Result<(), Error>,
) -> Result<String, Error> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (width as u32, height as u32)).into_drawing_area();
        root.fill(&WHITE).map_err(failed)?;
        draw(&root)?;
        root.present().map_err(failed)?;
    }
    let size = |width, height| format!(r#"<svg width="{width}" height="{height}""#);
    Ok(svg.replacen(&size(width, height), &size(width / UNITS, height / UNITS), 1))
}

/// How wide a text of medium size is, roughly: nobody measures fonts here.
pub(super) fn width(text: &str) -> i32 {
    text.chars().count() as i32 * MEDIUM * 56 / 100
}

/// A failure of the drawing library, which has nothing to do with the data.
pub(super) fn failed(error: impl std::fmt::Display) -> Error {
    Error::internal(format!("a plot cannot be drawn: {error}"))
}
