// The bot without Python: answers the lines of standard input with the search, weights and words of scripted.pt.
//
//   cmake -S deploy -B build -DCMAKE_PREFIX_PATH="$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')"
//   cmake --build build
//   echo "Hello, who are you?" | build/chat runs/sample/scripted.pt
//
// C++ knows nothing of scripts. ICU does: its regular expressions have the properties helpers/text.py asks for. What
// is not done here: HTML's entities, which a line on standard error says; and what needs a run's settings: declining,
// context, and cutting long queries, unless their number of words follows as a second argument.
#include <torch/script.h>
#include <unicode/locid.h>
#include <unicode/normalizer2.h>
#include <unicode/regex.h>

#include <iostream>
#include <map>
#include <memory>

using icu::UnicodeString;
using Words = std::vector<UnicodeString>;
enum { PAD, SOS, EOS, UNK };

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
    UnicodeString capital(u_totitle(text.char32At(start)));
    if (capital.length() == length) result.replace(start, length, capital);
    return true;
  });
  return result;
}

Words strings(const UnicodeString& json, const UnicodeString& key) {
  // The strings of a key's value: of a list one after the other, of an object names and values in turn.
  Words found;
  int64_t end = json.indexOf(u"\"" + key + u"\": ") + key.length() + 4;
  each(STRING, json, end, [&](auto& matcher, auto& status) {
    if (matcher.start(status) != end) return false;
    end = matcher.end(status);
    found.push_back(matcher.group(1, status).unescape());
    return true;
  });
  return found;
}

int main(int count, char** arguments) try {
  if (count < 2) throw std::runtime_error("give a scripted.pt, and the most words of a query if there is a limit");
  const size_t longest_query = count > 2 ? std::stoul(arguments[2]) : 10000;
  torch::NoGradGuard no_gradients;
  torch::jit::ExtraFilesMap extra{{"vocabulary.json", ""}, {"limits.json", ""}};
  auto search = torch::jit::load(arguments[1], torch::kCPU, extra);
  const int64_t longest_reply = std::stol(extra["limits.json"].substr(extra["limits.json"].find(':') + 1));
  const UnicodeString json = UnicodeString::fromUTF8(extra["vocabulary.json"]), marks = strings(json, u"marks").at(0);
  UnicodeString word = WORD;
  for (int32_t at = 0; at < marks.length(); at = marks.moveIndex32(at, 1)) (word += u"|\\") += marks.char32At(at);
  Words words{u"<pad>", u"<sos>", u"<eos>", u"<unk>"}, spelt = strings(json, u"spelling");
  for (const auto& known : strings(json, u"words")) words.push_back(known);
  std::map<UnicodeString, int64_t> ids;
  for (const auto& known : words) ids.emplace(known, ids.size());
  for (size_t at = 0; at + 1 < spelt.size(); at += 2) words.at(ids.at(spelt[at])) = spelt[at + 1];

  for (std::string line; std::getline(std::cin, line);) {
    UnicodeString text = UnicodeString::fromUTF8(line), reply;
    text.remove(0, text.moveIndex32(text.length(), -10000));
    each(ENTITY, text, 0, [](auto& matcher, auto& status) {
      std::string found;
      std::cerr << matcher.group(status).toUTF8String(found) << " is read as it stands, not as HTML's entity\n";
      return true;
    });
    Words asked = tokenise(text, word);
    if (asked.size() > longest_query) asked.erase(asked.begin(), asked.end() - longest_query);
    std::vector<int64_t> query;
    for (const auto& said : asked) query.push_back(ids.count(said) ? ids.at(said) : UNK);
    const auto length = static_cast<int64_t>(query.size());
    if (query.empty()) {
      reply = text.trim().isEmpty() ? u"Say something, and I will answer." : u"I see no word in that. Try a sentence?";
    } else {
      auto spoken = search.forward({torch::tensor(query).unsqueeze(0), torch::tensor({length}), longest_reply});
      for (auto id : spoken.toTensor()[0].unbind()) {
        if (id.item<int64_t>() == EOS) break;
        reply += (reply.isEmpty() ? u"" : u" ") + words.at(id.item<int64_t>());
      }
      reply = reply.isEmpty() ? u"I have no words for that." : spell(reply);
    }
    std::string written;
    std::cout << reply.toUTF8String(written) << std::endl;
  }
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 1;
}
