//! Shares before and after, as horizontal bars: a group for each figure that was measured twice, under its stage. With
//! several runs a bar is the mean and a whisker one sample standard deviation to each side.

use dsv3_core::Error;
use dsv3_engine::{Contrast, Report, Spread, Variant};
use plotters::{coord::Shift, prelude::*, style::text_anchor::HPos};

use super::{
    counted,
    style::{self, GRID, INK, LARGE, MEDIUM, SMALL, UNITS, failed},
};

/// Length of the scale from 0 to 1.
const SCALE: i32 = 440 * UNITS;
/// Room for values right of the scale.
const RIGHT: i32 = 110 * UNITS;
/// Least room for names left of it.
const LEFT_MIN: i32 = 170 * UNITS;
const BAR: i32 = 13 * UNITS;
const BETWEEN_GROUPS: i32 = 10 * UNITS;
const STAGE_TITLE: i32 = 30 * UNITS;
const HEAD: i32 = 40 * UNITS;
const FOOT: i32 = 56 * UNITS;

/// A drawing whose scale begins at `left`.
struct Plot<'a, 'b> {
    root: &'a DrawingArea<SVGBackend<'b>, Shift>,
    left: i32,
}

/// The plot and what it shows; none when no share was measured twice.
pub(super) fn draw(report: &Report) -> Result<Option<(String, String)>, Error> {
    let contrasts = &report.contrasts;
    if contrasts.is_empty() {
        return Ok(None);
    }
    let starts_stage = |i: usize| i == 0 || contrasts[i - 1].stage != contrasts[i].stage;
    let group = |contrast: &Contrast| contrast.variants.len() as i32 * BAR + BETWEEN_GROUPS;
    let titles = (0..contrasts.len()).filter(|i| starts_stage(*i)).count() as i32;
    let body = titles * STAGE_TITLE + contrasts.iter().map(group).sum::<i32>();
    let longest = contrasts.iter().map(|contrast| style::width(&contrast.figure)).max().unwrap_or(0);
    let left = LEFT_MIN.max(longest + 30 * UNITS);
    let svg = style::svg((left + SCALE + RIGHT, HEAD + body + FOOT), |root| {
        let plot = Plot { root, left };
        plot.legend(contrasts)?;
        plot.scale(HEAD, HEAD + body, report.runs.len())?;
        let mut y = HEAD;
        for (i, contrast) in contrasts.iter().enumerate() {
            if starts_stage(i) {
                let at = (14 * UNITS, y + STAGE_TITLE / 2 + 2 * UNITS);
                plot.text(&contrast.stage, at, LARGE, HPos::Left)?;
                y += STAGE_TITLE;
            }
            plot.bars(contrast, y)?;
            y += group(contrast);
        }
        Ok(())
    })?;
    let stages = counted(titles as usize, "stage");
    Ok(Some((svg, format!("{} before and after, of {stages}", counted(contrasts.len(), "share")))))
}

fn colour(variant: Variant) -> RGBColor {
    style::colour(match variant {
        Variant::Before => 3,
        Variant::YarnUntrained => 5,
        Variant::After | Variant::Gain => 0,
    })
}

impl Plot<'_, '_> {
    /// The place of a share on the scale.
    fn x(&self, share: f64) -> i32 {
        self.left + (f64::from(SCALE) * share.clamp(0.0, 1.0)).round() as i32
    }

    fn text(&self, text: &str, at: (i32, i32), size: i32, side: HPos) -> Result<(), Error> {
        self.root.draw(&Text::new(text, at, style::text(size, side))).map_err(failed)
    }

    fn fill(&self, corners: [(i32, i32); 2], colour: RGBColor) -> Result<(), Error> {
        self.root.draw(&Rectangle::new(corners, colour.filled())).map_err(failed)
    }

    fn legend(&self, contrasts: &[Contrast]) -> Result<(), Error> {
        let mut at = self.left;
        for variant in [Variant::Before, Variant::YarnUntrained, Variant::After] {
            if !contrasts.iter().any(|one| one.variants.iter().any(|(other, _)| *other == variant)) {
                continue;
            }
            self.fill([(at, HEAD / 2 - 6 * UNITS), (at + 18 * UNITS, HEAD / 2 + 6 * UNITS)], colour(variant))?;
            self.text(variant.label(), (at + 25 * UNITS, HEAD / 2), MEDIUM, HPos::Left)?;
            at += 50 * UNITS + style::width(variant.label());
        }
        Ok(())
    }

    /// The grid, its ticks and the name of the axis.
    fn scale(&self, top: i32, bottom: i32, runs: usize) -> Result<(), Error> {
        for tick in 0..=5 {
            let share = f64::from(tick) / 5.0;
            let colour = if tick == 0 { INK } else { GRID };
            self.fill([(self.x(share), top), (self.x(share) + UNITS, bottom)], colour)?;
            self.text(&format!("{share:.1}"), (self.x(share), bottom + 13 * UNITS), SMALL, HPos::Center)?;
        }
        let name = match runs {
            1 => "share".to_owned(),
            n => format!("share: mean of {n} runs, whiskers one sample standard deviation"),
        };
        self.text(&name, (self.x(0.5), bottom + 36 * UNITS), MEDIUM, HPos::Center)
    }

    fn bars(&self, contrast: &Contrast, top: i32) -> Result<(), Error> {
        let middle = top + contrast.variants.len() as i32 * BAR / 2;
        self.text(&contrast.figure, (self.left - 10 * UNITS, middle), MEDIUM, HPos::Right)?;
        let mut rows = contrast.variants.iter().enumerate();
        rows.try_for_each(|(i, (variant, spread))| self.bar(*variant, *spread, top + i as i32 * BAR))
    }

    fn bar(&self, variant: Variant, spread: Spread, top: i32) -> Result<(), Error> {
        let Spread { mean, deviation, .. } = spread;
        let (left, bottom) = (self.left + UNITS, top + BAR - 2 * UNITS);
        self.fill([(left, top), (self.x(mean).max(left + UNITS), bottom)], colour(variant))?;
        let (mut end, mut value) = (self.x(mean), format!("{mean:.2}"));
        if let Some(deviation) = deviation {
            let (low, high, middle) = (self.x(mean - deviation), self.x(mean + deviation), (top + bottom) / 2);
            let cap = 3 * UNITS;
            self.fill([(low, middle), (high, middle + UNITS)], INK)?;
            self.fill([(low, middle - cap), (low + UNITS, middle + cap + UNITS)], INK)?;
            self.fill([(high, middle - cap), (high + UNITS, middle + cap + UNITS)], INK)?;
            end = high;
            value = format!("{mean:.2} ± {deviation:.2}");
        }
        self.text(&value, (end + 7 * UNITS, (top + bottom) / 2 + UNITS / 2), SMALL, HPos::Left)
    }
}
