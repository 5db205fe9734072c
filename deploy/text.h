// Text to words and back, as helpers/text.py has it, and the little of JSON that a vocabulary takes.
//
// C++ knows nothing of scripts. ICU does: its regular expressions have the properties that helpers/text.py asks for.
// HTML's entities are not read; a line on standard error says so.
#pragma once
#include <unicode/locid.h>
#include <unicode/normalizer2.h>
#include <unicode/regex.h>

#include <iostream>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

using icu::UnicodeString;
using Words = std::vector<UnicodeString>;

const UnicodeString UNSPACED =
    uR"(\p{scx=Hani}\p{scx=Hira}\p{scx=Kana}\p{scx=Thai}\p{scx=Laoo}\p{scx=Khmr}\p{scx=Mymr})";
const UnicodeString LETTER = uR"((?:[[\p{L}\p{Nd}]--[)" + UNSPACED + uR"(]]\p{M}*+))";
const UnicodeString EMOJI = uR"([\p{Extended_Pictographic}--[\u00a9\u00ae\u203c\u2049\u2122]]\p{Emoji_Modifier}?)";
const UnicodeString WORD = LETTER + u"++(?:'" + LETTER + u"++)*+|[[" + UNSPACED + uR"(]&&[\p{L}\p{N}]]\p{M}*+|)" + EMOJI
    + uR"((?:\u200d)" + EMOJI + uR"()*+|\p{Regional_Indicator}{2})";
const UnicodeString ENTITY = u"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});";
const UnicodeString STRING = uR"~([\[{,:\s]*"((?:[^"\\]|\\.)*+)")~";  // in JSON, with what stands before it

using Matcher = std::unique_ptr<icu::RegexMatcher>;

Matcher matcher_of(const UnicodeString& pattern, const UnicodeString& text, UErrorCode& status) {
  // To compile a pattern takes longer than to match a line.
  static std::map<UnicodeString, std::unique_ptr<icu::RegexPattern>> compiled;
  auto& known = compiled[pattern];
  if (!known) known.reset(icu::RegexPattern::compile(pattern, 0, status));
  if (U_FAILURE(status)) throw std::runtime_error(u_errorName(status));
  return Matcher(known->matcher(text, status));
}

template <class Found>  // called with the matcher at each place, until it returns false
void each(const UnicodeString& pattern, const UnicodeString& text, int64_t start, Found found) {
  UErrorCode status = U_ZERO_ERROR;
  auto matcher = matcher_of(pattern, text, status);
  for (bool more = matcher->find(start, status); more && found(*matcher, status);) more = matcher->find(status);
  if (U_FAILURE(status)) throw std::runtime_error(u_errorName(status));
}

UnicodeString replaced(const UnicodeString& text, const UnicodeString& pattern, const UnicodeString& by) {
  UErrorCode status = U_ZERO_ERROR;
  UnicodeString result = matcher_of(pattern, text, status)->replaceAll(by, status);
  if (U_FAILURE(status)) throw std::runtime_error(u_errorName(status));
  return result;
}

UnicodeString composed(const UnicodeString& text) {
  UErrorCode status = U_ZERO_ERROR;
  return icu::Normalizer2::getNFCInstance(status)->normalize(text, status);
}

Words tokenise(UnicodeString text, const UnicodeString& word) {
  each(ENTITY, text, 0, [](auto& matcher, auto& status) {
    std::string found;
    std::cerr << matcher.group(status).toUTF8String(found) << " is read as it stands, not as HTML's entity\n";
    return true;
  });
  text = replaced(text, uR"(</?[a-zA-Z]{1,10}(?:\p{White_Space}[^<>]{0,200})?/?>)", u" ");
  text = replaced(replaced(text, uR"([\u2018\u2019\u02bc\u0091\u0092\u00b4])", u"'"), u"\u0130", u"i");
  text = replaced(text, uR"((?!\u200d)[\p{Cf}\ufe00-\ufe0f]|\u200d(?!\p{Extended_Pictographic}))", u"");
  Words words;
  each(word, composed(replaced(text, uR"((\p{M}{8})\p{M}+)", u"$1")), 0, [&](auto& matcher, auto& status) {
    words.push_back(composed(matcher.group(status).toLower(icu::Locale::getRoot())));
    return true;
  });
  return words;
}

UnicodeString spell(UnicodeString text) {
  text = replaced(text, u"(?<=[" + UNSPACED + uR"(。！？．]\p{M}{0,9}) (?=[)" + UNSPACED + u"])", u"");
  text = replaced(text, uR"((?<=[¿¡]) | (?=[\p{P}--[¿¡]]))", u"");
  UnicodeString result = text;
  each(uR"((?<=^|[.!?] [¿¡]?)\p{Ll})", text, 0, [&](auto& matcher, auto& status) {
    int32_t start = matcher.start(status), length = matcher.end(status) - start;
    const int32_t letter = text.char32At(start);
    UnicodeString capital(u_totitle(letter));
    if (u_tolower(capital.char32At(0)) == letter && capital.length() == length) result.replace(start, length, capital);
    return true;
  });
  return result;
}

int64_t place(const UnicodeString& json, const UnicodeString& key) {
  // Where a key's value begins.
  const int32_t at = json.indexOf(u"\"" + key + u"\": ");
  if (at < 0) throw std::runtime_error("the file was made by another version: notebook 07 makes a new one");
  return at + key.length() + 4;
}

Words strings(const UnicodeString& json, int64_t start) {
  // The strings of the value that begins there: of a list one after the other, of an object names and values in turn.
  Words found;
  each(STRING, json, start, [&](auto& matcher, auto& status) {
    if (matcher.start(status) != start) return false;
    start = matcher.end(status);
    found.push_back(matcher.group(1, status).unescape());
    return true;
  });
  return found;
}
